"""The corridor once, from a job to a report: probe, plan, cut, train, measure."""
