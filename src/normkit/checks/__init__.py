"""`normkit.check`: normalization mistakes, found with evidence before they cost a week."""
