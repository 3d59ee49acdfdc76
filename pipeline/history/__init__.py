"""The record over the runs of a store: metrics tables, scores over time, and which old runs may go."""
