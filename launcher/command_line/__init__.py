"""What all commands of `ditmoe` have in common: help with examples, messages on wrong usage, completion."""
