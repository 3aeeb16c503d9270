"""What is computed: a dense decoder-only transformer. Knows nothing of devices."""
