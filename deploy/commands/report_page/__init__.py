"""The page of `ddpo report`: one HTML file that needs nothing else, from what a run has left and a comparison."""
