"""What jobs cost, and what they ask of a cluster, told before anything runs."""
