"""vtpmd: one engine, one guest link, one manager link. Standard library and compiled engine alone."""
