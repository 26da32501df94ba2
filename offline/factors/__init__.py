"""From ranks to factors: solvers, error-aware targets, stored forms, baselines."""
