"""What can be packed: each module is one kind of source, all with the same face (`base.py`).

Seam: a new kind is a module with a `Source` and a line in `open_source` (`opening.py`).
"""
