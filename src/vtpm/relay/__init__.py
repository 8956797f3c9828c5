"""vtpm-relay: carries a vTPM's guest link between the host and the virtual machine that its vtpmd lives in."""
