"""What a guest's side connects to: QEMU's emulator protocol and the plain data socket."""
