"""Generated from proto/kvd/v1/kvd.proto by `make proto`; not to be edited."""
