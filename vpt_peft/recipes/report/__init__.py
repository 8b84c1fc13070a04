"""What a run leaves behind: scores, plots, results.json, the model and its card, and a repository on the Hub."""
