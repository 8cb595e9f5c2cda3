"""Redo the paper's experiments on small data: ``experiments`` trains, ``claims`` judges, ``figures`` draws."""
