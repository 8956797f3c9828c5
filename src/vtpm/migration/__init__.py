"""Source and destination state machines of moving a vTPM."""
