"""Nano: a small Kandinsky 5 trained on a drawn world (`world`), and a judge of clips of it (`judge`)."""
