"""The commands: one frozen dataclass each. Its fields are the arguments, its docstring the help, `run()` the job.

A module here imports settings when it is imported, and what a job needs when that job runs, so that a mistake on the
command line is told at once.
"""
