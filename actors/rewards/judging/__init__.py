"""What rewards share that ask a vision-language model about an image: requests, answers, their cache and their costs."""
