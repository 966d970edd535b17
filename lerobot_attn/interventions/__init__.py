"""Acting on a policy while it runs, with everything else held fixed: an intervention is data."""
