"""A search over placements: candidates by Optuna, trained in groups under one program, halved rung by rung.

`space.py` says what can be chosen, `plan.py` how much of it is tried, `proposals.py` asks Optuna, `halving.py` decides
who goes on, `groups.py` trains, `table.py` holds what was found, and `finals.py` tries the best again with fresh seeds.
"""
