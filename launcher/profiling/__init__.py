"""Where the time of a training step goes: traces, a table by part of the network, and a timeline."""
