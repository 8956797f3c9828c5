"""Sans-I/O codecs of every protocol, and the thin sockets of the services. Imports tpm and errors."""
