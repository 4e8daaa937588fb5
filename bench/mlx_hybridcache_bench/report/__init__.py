"""What `bench ttft` found out, and how it is told: sheets, pictures, one page, one sentence."""
