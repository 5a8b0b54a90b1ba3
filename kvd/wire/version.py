"""The release, and the protocol numbers it speaks."""

VERSION = "0.1.0"

#: Lowest and highest protocol number this release speaks; Hello and Welcome agree on the highest common one.
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
