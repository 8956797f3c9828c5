"""Images to test and measure with: built from a copy of the sources, booted under emulation."""
