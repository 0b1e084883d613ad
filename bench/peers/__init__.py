"""UserService as other stacks would write it, to compare Roster with."""
