"""Tables, statistics, verdicts on the paper's claims, and figures, all made from the results on disk."""
