"""`python -m kandinsky5` is the console command `kandinsky5`."""

from kandinsky5 import cli

if __name__ == "__main__":
    cli.end(cli.dispatch)
