"""``kvd bench``: each part of kvd measured against its own limit, in the same run, interleaved.

A limit is what the machine does without kvd: a memcpy, a bare socket, an empty call. Ratios of medians hold on a noisy
machine; single figures do not.
"""
