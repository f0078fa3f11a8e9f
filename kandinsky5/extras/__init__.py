"""What can be deleted while the story still runs: previews, replays, step skipping, looking inside."""
