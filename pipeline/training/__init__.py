"""The training loop. A killed training resumes and ends with the same bits."""
