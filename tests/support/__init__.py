"""Shared by the tests: jobs as real processes, the script that they run, and the search for what a job left behind."""
