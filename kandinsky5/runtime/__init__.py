"""How a model runs, never what it computes: each file changes a finished model in place, or can be left out."""
