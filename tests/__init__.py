"""The tests: unit, contract, crash, e2e, soak, arch."""
