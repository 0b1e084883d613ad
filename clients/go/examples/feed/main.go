// Command feed prints the changes of users. It stores its position in a file, and continues there.
//
//	feed ADDRESS FILE
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	roster "example.com/roster/clients/go"
	rosterv1 "example.com/roster/clients/go/roster/v1"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: feed ADDRESS FILE")
	}
	address, file := os.Args[1], os.Args[2]
	client, err := roster.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	token, err := os.ReadFile(file) // missing at first: begin now
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Fatal(err)
	}
	for response, err := range roster.Watch(context.Background(), client.Changes, string(token), rosterv1.Change_USERS) {
		if err != nil {
			log.Fatal(err)
		}
		for _, change := range response.Changes {
			if user := change.GetUser(); user != nil {
				fmt.Printf("user %d is %s\n", user.Id, user.Email)
			} else {
				fmt.Printf("user %d is deleted\n", change.GetDeletedUserId())
			}
		}
		if len(token) == 0 {
			fmt.Println("watching")
		}
		token = []byte(response.Token)
		// A file that is half written would lose the position.
		if err := os.WriteFile(file+".new", token, 0o600); err != nil {
			log.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			log.Fatal(err)
		}
	}
}
