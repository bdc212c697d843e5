"""Results in words, figures (numbers first, then drawings) and one self-contained HTML page."""
