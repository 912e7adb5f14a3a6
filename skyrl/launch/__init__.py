"""From a machine, a list of hosts or a Slurm job to running ranks; and what belongs to it: staging for nodes without
internet, a check of the machine, points of a sweep and their table. Imports without torch."""
