"""Power loss: a writer that runs in a guest, and the replay of what its disk was told. For test_power_loss."""
