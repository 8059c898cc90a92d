from services.gpu_worker.worker import main

main()
