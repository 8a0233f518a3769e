"""The verbs of the `ditmoe` command, a module each; they are imported when they are asked for."""
