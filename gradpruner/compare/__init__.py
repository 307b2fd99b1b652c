"""Many runs beside each other: experiment, costs, statistics, tables, page."""
