"""``python -m stseg``: the console command."""

import sys

from stseg.command import main

sys.exit(main())
