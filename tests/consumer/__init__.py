"""What reads outputs as their runtimes do, for tests; `load_mindie.py` is a script."""
