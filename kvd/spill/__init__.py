"""Records on disks. The books (``kvd.ledger``) decide what is written, read, moved and dropped; this room does it.

How the pieces are put together, in this order:

    drives = [Drive(index, parent, size_bytes, floor_bytes=...) for index, parent in enumerate(parents)]
    space = Extents(len(drives), first_sequence=time.time_ns())        # on the loop; kvd.ledger.terms.ExtentSpace
    movers = Movers(segment.data, drives, complete, watcher, encoder=Encoder(scratch_bytes) or None)
    for drive in drives: drive.open()       # in a thread, or left to movers.start(): a disk may hang
    movers.start()
    ...
    movers.submit(order)                    # -> complete(Result), exactly once
    ...
    scan.stop(); scan.join(t); movers.close(timeout_s)                 # then the pool may be unmapped, if True

``complete`` and the ``watcher`` are called in threads: they pass things on with ``call_soon_threadsafe``. On the loop:

    attached(drive, attachment):  space.attach(drive, *attachment); drives[drive].namespaces() (in a thread);
                                  Scan(drives[drive], attachment.existing, found, ended).start()
    found(batch):                 each record: space.adopt(place), and into the books, or space.release(place) at the
                                  end of the batch; then, if batch.last: space.scanned(batch.drive, batch.extent)
    state_changed(drive, state):  space.set_working(drive, state is DriveState.WORKING)
    available(drive, extents):    drives[drive].give_back(space.set_available(drive, extents))
    lost(drive, extents):         space.removed(drive, extents); the books drop every record in them

record, extents, files, health, budget and codec know nothing of threads or each other; directory and superblock are
what lies on the disk; extent_files and drive keep one directory; transfer moves one record; queues and engine are the
threads; scan reads what a former daemon left.
"""

#: Where a crash test may end the daemon (``kvd.failpoints``): before and after each step that changes a file.
NAMES = (
    "spill.superblock.before",
    "spill.superblock.after",
    "spill.namespace.before",
    "spill.namespace.after",
    "spill.extent.allocate.before",
    "spill.extent.allocate.after",
    "spill.extent.open.before",
    "spill.extent.open.after",
    "spill.record.write.before",
    "spill.record.header.before",
    "spill.record.write.after",
    "spill.extent.sync.before",
    "spill.extent.sync.after",
    "spill.extent.remove.before",
    "spill.extent.remove.after",
    "spill.read.before",
    "spill.read.after",
    "spill.move.before",
    "spill.move.header.before",
    "spill.move.after",
)
