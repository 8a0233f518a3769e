"""The `ditmoe` command, the run configuration, the training program and the local launch."""
