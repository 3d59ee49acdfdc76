"""The training loop. A killed training resumes, and its result is the same bit for bit."""
