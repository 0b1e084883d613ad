// Command calls makes single calls: a write that can be repeated, an error, an update, and a list page by page.
//
//	calls ADDRESS
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	roster "example.com/roster/clients/go"
	rosterv1 "example.com/roster/clients/go/roster/v1"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: calls ADDRESS")
	}
	client, err := roster.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if err := run(context.Background(), client); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, client *roster.Client) error {
	user := &rosterv1.User{Email: "ada@example.org"}
	// With SKIP, a user who has the e-mail is returned, so that the program can run again.
	skip := &rosterv1.CreateUserRequest{User: user, OnConflict: rosterv1.BulkOptions_SKIP}
	ada, err := client.Users.CreateUser(ctx, skip)
	if err != nil {
		return err
	}
	fmt.Printf("user %d, version %d\n", ada.Id, ada.Version)

	// By default, the e-mail must be free.
	_, err = client.Users.CreateUser(ctx, &rosterv1.CreateUserRequest{User: user})
	switch roster.Reason(err) {
	case "EMAIL_TAKEN":
		fmt.Printf("user %s has this e-mail\n", roster.ErrorFrom(err).Facts["existing_id"])
	default:
		return fmt.Errorf("expected that the e-mail is taken: %w", err)
	}

	name := "Ada King"
	change := &rosterv1.User{Id: ada.Id, FullName: &name, Version: ada.Version}
	if ada, err = client.Users.UpdateUser(ctx, &rosterv1.UpdateUserRequest{User: change}); err != nil {
		return err
	}
	fmt.Printf("%s, version %d\n", ada.GetFullName(), ada.Version)

	list := &rosterv1.ListUsersRequest{Filter: `email = "ada@example.org"`, PageSize: 100}
	for user, err := range roster.Pages(ctx, client.Users.ListUsers, list, (*rosterv1.ListUsersResponse).GetUsers) {
		if err != nil {
			return err
		}
		fmt.Println(user.Email)
	}
	return nil
}
