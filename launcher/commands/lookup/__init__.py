"""Commands that tell what there is: configurations, keys, pages, and what completes a command line."""
