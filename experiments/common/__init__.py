"""What the experiments have in common: flags, records, figures, statistics, data and networks."""
