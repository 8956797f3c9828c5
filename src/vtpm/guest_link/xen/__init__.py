"""The guest link on Xen: a PV TPM back-end in user space, over xenstore, a granted page and an event channel.

For whoever has an engine to serve with. Decision record 28. `backend` has the back-end, `libxen` the door to Xen.
"""
