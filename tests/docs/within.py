"""`ditmoe` in a folder and with an environment that are not those of the process which this one is forked from.

python within.py '{"folder": …, "environment": {…}, "arguments": […]}'
"""

import json
import os
import sys

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    sys.argv = ["ditmoe", *asked["arguments"]]
    from ditmoe.launcher.cli import main

    main()
