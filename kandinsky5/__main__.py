"""`python -m kandinsky5` is the console command `kandinsky5`."""

import sys

from kandinsky5.cli import main

if __name__ == "__main__":
    sys.exit(main())
