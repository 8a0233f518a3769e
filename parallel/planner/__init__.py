"""What a layout needs and how fast it would be: by formulas, and by a run of one rank without any memory."""
