"""`roster load --mirror`: make the users that match a filter equal to a file.

    file   ──► values ──┐
                        ├──► difference (on disk) ──► plan ──► deletes, updates, creates
    export ──► values ──┘

Each run makes a new plan, and each row is written only if its user is as the plan found it.
"""
